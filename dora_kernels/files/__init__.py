"""Reading and writing files so that nothing is lost: tensors, replacement in one step, two files as one."""
