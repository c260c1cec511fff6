"""Operations that several methods share: blocks, selection, sign election, inner products. No whole method."""
