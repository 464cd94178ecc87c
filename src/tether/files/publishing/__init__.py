"""A model for others: its card, and the Hugging Face Hub."""

from tether.files.publishing.card import card
from tether.files.publishing.hub import pull, push

__all__ = ["card", "pull", "push"]
