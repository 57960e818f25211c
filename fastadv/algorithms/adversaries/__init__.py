"""How x_adv is made from x: one file an adversary."""
