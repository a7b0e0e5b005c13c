"""The parts of make_datalist.py."""
