"""Any factors within their ranges give a valid crop, the same one twice."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pkd.toolkit.synthetic.faces import OCCLUSIONS, Conditions, Identity, draw

FACTOR = st.floats(-1, 1)
IDENTITIES = st.builds(
    Identity, **{f.name: FACTOR for f in fields(Identity) if f.name != "marks"}, marks=st.integers(0, 2**31)
)
SEEDS = st.integers(0, 2**31)
CONDITIONS = st.builds(
    Conditions, yaw=st.floats(-35, 35), pitch=st.floats(-20, 20), roll=st.floats(-12, 12), shift_x=st.floats(-6, 6),
    shift_y=st.floats(-6, 6), zoom=st.floats(0.85, 1.15), light_azimuth=st.floats(-85, 85),
    light_elevation=st.floats(-45, 70), light_strength=st.floats(0, 1), exposure=st.floats(0.5, 1.8), warmth=FACTOR,
    contrast=st.floats(0.6, 1.5), smile=FACTOR, mouth_open=st.floats(0, 1), brow_raise=FACTOR, eyelids=st.floats(0, 1),
    gaze=FACTOR, occlusion=st.sampled_from(OCCLUSIONS), occlusion_seed=SEEDS, blur=st.floats(0, 3),
    noise=st.floats(0, 20), jpeg=st.integers(0, 100), scene=SEEDS,
)  # fmt: skip


@settings(max_examples=60)
@given(IDENTITIES, CONDITIONS)
def test_any_face_is_a_crop_and_is_repeatable(identity: Identity, conditions: Conditions) -> None:
    crop = draw(identity, conditions)
    assert crop.dtype == np.uint8
    assert crop.shape == (112, 112, 3)
    assert np.array_equal(crop, draw(identity, conditions))
