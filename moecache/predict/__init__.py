"""The one predictor: ops say what work a config makes, and this room says how many µs that takes.

`rank` orders configs of a problem with what is known of the device: parameters fitted here, shipped ones, or constants.
"""
