"""The decoder of a Llama-like model on a CPU, forward and backward, with products chosen by a trial."""
