"""The main job: find the direction, choose an edit by measurement, remove it, prove the result, write it down."""
