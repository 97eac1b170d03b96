"""What a converted model is made of: quantized linears, the decoder layer, attention masks."""
