"""How a backend says that it cannot serve a request."""

from __future__ import annotations


class Unsupported(NotImplementedError):  # noqa: N818 - what it says, not an accident
    """This backend cannot serve the request, and the message says why: the dispatcher tries the next backend.

    Dispatch catches this class alone, so that a NotImplementedError of Pallas or JAX never becomes a silent fallback.
    """
