"""To run the tests of any project on fastreg: the pytest plugin `fastreg.testing.patched`."""
