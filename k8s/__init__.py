"""Kubernetes manifests, shipped as package data."""
