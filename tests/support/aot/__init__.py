"""What is known of the kernels without a GPU: what each moves and multiplies, and what it compiles to per target."""

PRIMITIVES = ("weight_norm", "kept_norm", "merge", "compose", "product", "one_pass", "scale_reduce", "factor_grads")
