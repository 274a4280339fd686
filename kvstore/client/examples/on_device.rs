//! Leases a block in the memory of a device, computes it there and reads it where it
//! lies. Needs the daemon's local socket, and a daemon that owns memory of a device.
//!
//! `cargo run --release -p terrace-client --example on_device -- SOCKET cuda:0`

use terrace_client::{
    Durability, Leased, Outcome, ReadOptions, Reserved, SpaceKind, SpaceManifest, Target, WriteOptions,
    blocking,
};
use terrace_core::{ByteCount, TokenCount};
use terrace_gpudirect::DeviceName;

const BLOCK_BYTES: usize = 64 << 10;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let socket = std::env::args().nth(1).ok_or("give the path of the daemon's socket")?;
    let name = std::env::args().nth(2).ok_or("give the device, for example cuda:0")?;
    // Host memory stands in for a device if both the daemon and we are told so by name.
    let device = name.parse::<DeviceName>()?.open(ByteCount::new(0))?;
    let target = Target { socket: Some(socket.into()), ..Target::default() };
    let session = blocking::Session::connect(&target)?;
    let number = session.add_device(device)?;
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
    let keys = [b"on device"];
    let mut lease = session.lease_write_on(number, &space, &keys, None, WriteOptions::default())?;
    match &mut lease.grants[0] {
        // An engine's kernels would store at `block.bytes().address()`, and be waited for.
        Outcome::Granted(Reserved::Device(block)) => block.write(&[7; BLOCK_BYTES])?,
        Outcome::Granted(Reserved::Host(block)) => block.write(&[7; BLOCK_BYTES])?,
        Outcome::Exists => println!("somebody has sealed it before"),
        other => return Err(format!("no frame: {other:?}").into()),
    }
    if lease.grants[0].granted().is_some() {
        session.run(lease.seal(&[0], Durability::Readable))?;
    }
    drop(lease);

    let lease = session.lease_read_on(number, &space, &keys, ReadOptions::default())?;
    let mut bytes = vec![0; BLOCK_BYTES];
    let place = match lease.grants[0].granted().ok_or("the block is not resident")? {
        Leased::Device(block) => {
            block.read_verified(&mut bytes)?;
            "on the device"
        }
        Leased::Host(block) => {
            block.read_verified(&mut bytes)?;
            "in host memory"
        }
    };
    println!("the block lies {place}; its first byte is {}", bytes[0]);
    Ok(())
}
