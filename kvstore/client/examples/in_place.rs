//! Computes a block in its frame and reads it where it lies, without a runtime of
//! one's own. Needs the daemon's local socket.
//!
//! `cargo run --release -p terrace-client --example in_place -- SOCKET`

use terrace_client::{
    Durability, Outcome, ReadOptions, SpaceKind, SpaceManifest, Target, WriteOptions, blocking,
};
use terrace_core::{ByteCount, TokenCount};

const BLOCK_BYTES: usize = 64 << 10;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let socket = std::env::args().nth(1).ok_or("give the path of the daemon's socket")?;
    let target = Target { socket: Some(socket.into()), ..Target::default() };
    let session = blocking::Session::connect(&target)?;
    let space = session.open_space(&SpaceManifest {
        model: "example".to_owned(),
        model_fingerprint: Vec::new(),
        weights_generation: 0,
        dtype: "f16".to_owned(),
        layout: "bytes".to_owned(),
        tokens_per_block: TokenCount::new(16),
        block_bytes: ByteCount::new(BLOCK_BYTES as u64),
        kind: SpaceKind::Chain,
        group: 0,
        topology: "canonical".to_owned(),
        rank: 0,
        engine: "example".to_owned(),
    })?;
    let keys = [b"in place"];
    let mut lease = session.lease_write(&space, &keys, None, WriteOptions::default())?;
    match &mut lease.grants[0] {
        Outcome::Granted(block) => {
            let checksum = block.write_checked(&[7; BLOCK_BYTES])?;
            session.run(lease.seal_with(&[(0, checksum)], Durability::Readable))?;
        }
        Outcome::Exists => println!("somebody has sealed it before"),
        other => return Err(format!("no frame: {other:?}").into()),
    }
    drop(lease);

    let lease = session.lease_read(&space, &keys, ReadOptions::default())?;
    let block = lease.grants[0].granted().ok_or("the block is not resident")?;
    let mut first = [0];
    block.bytes().part(0, 1).copy_to(&mut first);
    // Whatever was derived from the bytes counts only if they were still the block's.
    if !block.is_valid() {
        return Err("the block went while it was read; lease again".into());
    }
    println!("its first byte is {}, and its checksum is right: {}", first[0], block.verify().is_ok());
    Ok(())
}
