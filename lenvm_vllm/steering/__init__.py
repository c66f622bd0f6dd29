"""Pure maths: distributions, values and the landing. It knows no request and no vLLM."""
