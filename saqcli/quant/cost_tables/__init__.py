"""Tables of costs: what each layer of a network costs at given bits, measured or given by a person."""
