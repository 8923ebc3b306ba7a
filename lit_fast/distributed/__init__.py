"""What happens between the collectives: where gradients and shards lie, when they are sent, what rides with them.

Nothing here knows a Trainer; the strategies put these parts together.
"""
