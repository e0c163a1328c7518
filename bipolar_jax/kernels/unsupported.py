"""The error by which a backend refuses a request."""

from __future__ import annotations


class Unsupported(NotImplementedError):  # noqa: N818 - the name says what the request is, not that something broke
    """This backend cannot serve the request; the message says why, and the dispatcher tries the next backend.

    Dispatch catches this class only: a NotImplementedError of Pallas or JAX propagates to the caller.
    """
