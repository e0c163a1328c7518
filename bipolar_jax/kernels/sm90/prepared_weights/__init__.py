"""What kernels do with prepared weights: fields of codes become bytes in registers."""
