"""Quantizers of weights: a matrix in, int4 codes and scales out; they know no models."""
