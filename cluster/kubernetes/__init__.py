"""Recipes as KubeRay's RayJobs."""
