//! Stores two blocks and reads them back, by value: over the local socket where
//! there is one, else over gRPC.
//!
//! `cargo run --release -p terrace-client --example put_and_get -- SOCKET http://127.0.0.1:7070`

use terrace_client::{Durability, Session, SpaceKind, SpaceManifest, Target};
use terrace_core::{ByteCount, TokenCount};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let target = Target {
        socket: arguments.next().map(Into::into),
        grpc: arguments.next(),
        client_name: "put_and_get".to_owned(),
        ..Target::default()
    };
    let session = Session::connect(&target).await?;
    let space = session
        .open_space(&SpaceManifest {
            model: "example".to_owned(),
            model_fingerprint: Vec::new(),
            weights_generation: 0,
            dtype: "f16".to_owned(),
            layout: "bytes".to_owned(),
            tokens_per_block: TokenCount::new(16),
            block_bytes: ByteCount::new(64 << 10),
            kind: SpaceKind::Chain,
            group: 0,
            topology: "canonical".to_owned(),
            rank: 0,
            engine: "example".to_owned(),
        })
        .await?;
    let keys = [b"first".as_slice(), b"second"];
    let payloads = [vec![1; 64 << 10], vec![2; 64 << 10]];
    let sealed = session.write(&space, &keys, None, &payloads, Durability::Readable).await?;
    let found = session.read(&space, &keys).await?;
    let same = found.iter().zip(&payloads).all(|(found, payload)| found.as_ref() == Some(payload));
    println!("{:?}: sealed {sealed:?}, read back the same: {same}", session.transport());
    if same { Ok(()) } else { Err("a block that was sealed just now is not there".into()) }
}
