"""The analytic cost model."""
