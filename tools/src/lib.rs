//! The `terrace` program: runs a node in the foreground, shows what is where,
//! and measures.

mod admin;
mod bench;
mod block;
pub mod cli;
mod connect;
mod daemon_config;
mod doctor;
mod home;
mod inspect;
mod model;
mod output;
mod scrub;
mod up;
