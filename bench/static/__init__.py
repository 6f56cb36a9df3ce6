"""What is known of the kernels without a GPU: which launches ship, and what each compiles to on every target."""
