"""What hypothesis draws in several test files."""

from __future__ import annotations

from hypothesis import strategies as st

from ulmfit.config import RulesConfig

rules_configs = st.builds(
    RulesConfig,
    unicode=st.sampled_from(["nfc", "nfkc", "none"]),
    html=st.booleans(),
    case=st.booleans(),
    elongation=st.booleans(),
    repetition=st.booleans(),
)
