"""What everything else stands on: a layer's tensors, dtypes, products of matrices, checks of arguments, the oracle."""
