"""What people run today instead: published-style loops, torchattacks, ART."""
