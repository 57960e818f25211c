"""What is computed: the parts of every method, and the recipes that combine them."""
