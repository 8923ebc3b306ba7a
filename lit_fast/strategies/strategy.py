"""The kind that every strategy is of."""


class Strategy:
    """How a model spreads over devices and processes. `SingleDeviceStrategy` is the one there is so far."""
