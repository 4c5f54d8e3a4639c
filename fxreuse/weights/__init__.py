"""Which weights of different layers correspond, and the matrices that they are made of."""
