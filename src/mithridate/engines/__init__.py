"""Adapters that put attacks and defences into other people's training engines; the maths beside them imports none."""
