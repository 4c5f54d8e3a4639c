"""Recognition: the attentions of a program, found by data flow."""
