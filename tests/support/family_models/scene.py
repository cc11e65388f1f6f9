"""Size of the samples that the tests train on and draw."""

WIDTH, HEIGHT, FRAMES = 64, 32, 5  # not square, so that swapped axes show
