"""Memory snapshots that torch wrote on a real GPU: read, replayed by the allocator's rules, and explained."""
