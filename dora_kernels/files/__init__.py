"""Read and write files without losing any: tensors, replacement in one step, two files as one."""
