"""Shared-prefix attention: one function, a backend per kind of device."""
