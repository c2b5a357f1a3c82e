"""Measuring: the only clock, isolated trials of untested candidates, and the tuner that uses both."""
