//! What whole-node tests share: the programs, a running `terrace up`, and plain
//! HTTP requests to it.

pub mod node;
