//! Tests of the crate from outside, in one program.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;
mod copies;
mod cuda;
mod device;
mod fake;
mod files;
mod pass;
