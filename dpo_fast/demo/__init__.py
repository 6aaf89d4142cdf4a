"""What `dpo-fast demo` needs: its preference data, the small model it trains and the reward it is judged by."""
