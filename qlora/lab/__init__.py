"""The quantization lab: what the demo script prints, one idea a file."""
