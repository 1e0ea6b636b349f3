"""What the tests of the operators share: sizes around the vector widths, and the checks of opcheck."""

SIZES = [0, 1, 31, 32, 33, 127, 128, 129]

# For operators that return integers. Not test_aot_dispatch_dynamic: it adds up all outputs in place and stumbles over
# integers before floats; their traced gradients have a test of their own.
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
