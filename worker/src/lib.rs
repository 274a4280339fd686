//! The worker: a Llama-family model on the CPU whose K and V live in blocks.
//!
//! The engine promises bits: a prompt computed whole, in chunks, token by token,
//! alone or beside others, on one thread or many, or continued from sealed
//! blocks, gives the same blocks and the same scores. It knows nothing of the
//! store; it is handed memory. [`service`] leases that memory from the store and
//! puts the engine behind gRPC. [`tokenizer`] and [`chat`] need only a file's
//! header, so that a router can use them without weights.

pub mod chat;
pub mod gguf;
pub mod kernels;
pub mod kv;
pub mod model;
pub mod sampler;
pub mod service;
pub mod tiny;
pub mod tokenizer;
