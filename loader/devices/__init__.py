"""From tensors in files to arrays on devices, and the products over them."""
