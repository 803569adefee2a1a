"""J and its estimators as pure functions of tensors, with nothing but torch: `kl`, `advantages`,
`surrogate`, `preference`."""
