"""What it will take, before it is taken: the step of a training on tensors without numbers.

Options come in; bytes held, sent and read by each rank go out.
"""
