"""The adversaries, which make x_adv from x: one file per adversary."""
