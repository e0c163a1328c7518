"""Weights rounded and packed, or expanded from planes to bytes."""
