//! `block stat|locate|verify` and `prefix match`.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow, bail};
use clap::Args;
use serde_json::{Value, json};
use terrace_core::{TokenCount, chain_keys};
use terrace_proto::v1::{
    ListSpacesRequest, MatchPrefixRequest, SpaceInfo, SpaceKind, StatBlockRequest, StatBlockResponse, Tier,
    VerifyBlockRequest,
};
use terrace_proto::{BLOCKS_PER_REQUEST_MAX, v1};

use terrace_worker::chat::Message;
use terrace_worker::tokenizer::Tokenizer;

use crate::admin::tier_name;
use crate::cli::Target;
use crate::connect::{self, admin, refused};
use crate::output::{self, Format};

/// Which prompt to look for.
#[derive(Debug, Args)]
pub(crate) struct PrefixArgs {
    /// Text of the prompt, exactly as the model sees it; - reads standard input
    #[arg(long, required_unless_present = "tokens", conflicts_with = "tokens")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// The prompt file is one user message of a chat
    #[arg(long, conflicts_with = "tokens")]
    pub(crate) chat: bool,
    /// Token ids, separated by commas
    #[arg(long, value_delimiter = ',')]
    pub(crate) tokens: Option<Vec<u32>>,
    /// Model whose tokenizer reads the prompt file [default: the one that `terrace up` serves]
    #[arg(long)]
    pub(crate) model: Option<PathBuf>,
    /// Space to look in, 32 hex digits [default: the only one there is]
    #[arg(long, value_parser = parse_id)]
    pub(crate) space: Option<[u8; 16]>,
}

/// Reads an id of 32 hex digits.
///
/// # Errors
/// When it is anything else.
pub(crate) fn parse_id(text: &str) -> Result<[u8; 16], String> {
    let wrong = || format!("an id is 32 hex digits, this is {:?}", text.chars().take(40).collect::<String>());
    if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(wrong());
    }
    u128::from_str_radix(text, 16).map(u128::to_be_bytes).map_err(|_| wrong())
}

async fn ask(target: &Target, id: [u8; 16]) -> anyhow::Result<StatBlockResponse> {
    let request = StatBlockRequest { block_id: id.to_vec().into() };
    let block = admin(target).await?.stat_block(request).await.map_err(refused)?.into_inner();
    if !block.present {
        bail!("no tier holds block {}; `terrace prefix match` lists blocks that exist", output::hex(&id));
    }
    Ok(block)
}

pub(crate) async fn stat(target: &Target, format: Format, id: [u8; 16]) -> anyhow::Result<ExitCode> {
    let block = ask(target, id).await?;
    if format == Format::Json {
        output::json(&json!({
            "block_id": output::hex(&id),
            "space_id": output::hex(&block.space_id),
            "parent_id": output::hex(&block.parent_id),
            "length": block.length,
            "checksum": format!("{:016x}", block.checksum),
            "copies": block.copies.iter().map(copy_json).collect::<Vec<_>>(),
            "leases": block.leases,
            "children_pinned": block.children_pinned,
            "children_nvme": block.children_nvme,
            "idle_ms": block.idle_ms,
            "explanation": block.explanation,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    println!("block {}", output::hex(&id));
    println!("  space     {}", output::hex(&block.space_id));
    let parent =
        if block.parent_id.is_empty() { "none known".to_owned() } else { output::hex(&block.parent_id) };
    println!("  parent    {parent}");
    println!("  children  {} in Pinned, {} in Nvme", block.children_pinned, block.children_nvme);
    println!("  length    {} bytes, checksum {:016x}", block.length, block.checksum);
    println!("  used      {} ago", output::duration(block.idle_ms));
    let leases: Vec<_> = block.leases.iter().map(u64::to_string).collect();
    println!("  leases    {}", if leases.is_empty() { "none".to_owned() } else { leases.join(", ") });
    print_copies(&block.copies);
    for line in &block.explanation {
        println!("- {line}");
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn locate(target: &Target, format: Format, id: [u8; 16]) -> anyhow::Result<ExitCode> {
    let block = ask(target, id).await?;
    match format {
        Format::Json => output::json(&Value::Array(block.copies.iter().map(copy_json).collect()))?,
        Format::Table => print_copies(&block.copies),
    }
    Ok(ExitCode::SUCCESS)
}

fn copy_json(copy: &v1::BlockCopy) -> Value {
    json!({
        "tier": tier_name(copy.tier()),
        "device": copy.device,
        "chunk": copy.chunk,
        "frame": copy.frame,
        "offset": copy.offset,
        "state": copy.state,
        "verified": copy.verified,
        "pins": copy.pins,
    })
}

fn print_copies(copies: &[v1::BlockCopy]) {
    let mut table =
        output::table(&["COPY", "STATE", ">CHUNK", ">FRAME", ">OFFSET", ">PINS", "VERIFIED", "DEVICE"]);
    for copy in copies {
        table.add_row([
            tier_name(copy.tier()).to_owned(),
            copy.state.clone(),
            copy.chunk.to_string(),
            copy.frame.to_string(),
            copy.offset.to_string(),
            copy.pins.to_string(),
            if copy.verified { "yes" } else { "not yet" }.to_owned(),
            copy.device.clone(),
        ]);
    }
    output::print(&table);
}

pub(crate) async fn verify(target: &Target, format: Format, id: [u8; 16]) -> anyhow::Result<ExitCode> {
    let request = VerifyBlockRequest { block_id: id.to_vec().into() };
    let answer = admin(target).await?.verify_block(request).await.map_err(refused)?.into_inner();
    if answer.copies.is_empty() {
        bail!("no tier holds block {}; `terrace prefix match` lists blocks that exist", output::hex(&id));
    }
    let sound = answer.copies.iter().all(|copy| copy.ok);
    if format == Format::Json {
        let copies = answer.copies.iter().map(|copy| {
            json!({
                "tier": tier_name(copy.tier()), "ok": copy.ok, "detail": copy.detail,
                "expected": format!("{:016x}", copy.expected), "found": format!("{:016x}", copy.found),
            })
        });
        output::json(&json!({ "ok": sound, "copies": copies.collect::<Vec<_>>() }))?;
    } else {
        for copy in &answer.copies {
            let tier = tier_name(copy.tier());
            if copy.ok {
                println!("{tier}: sound, checksum {:016x}", copy.found);
            } else {
                println!(
                    "{tier}: DAMAGED, sealed {:016x}, found {:016x}: {}",
                    copy.expected, copy.found, copy.detail
                );
            }
        }
    }
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

pub(crate) async fn prefix(target: &Target, format: Format, args: PrefixArgs) -> anyhow::Result<ExitCode> {
    let mut admin = admin(target).await?;
    let spaces = admin.list_spaces(ListSpacesRequest {}).await.map_err(refused)?.into_inner().spaces;
    let space = choose_space(&spaces, args.space)?;
    let manifest =
        space.manifest.as_ref().context("nobody has opened this space since the daemon started")?;
    let tokens = prompt_tokens(target, &args)?;
    let per_block = manifest.tokens_per_block;
    let keys = chain_keys(&tokens, TokenCount::new(per_block));
    if keys.is_empty() {
        bail!("{} tokens are less than one block of {per_block}: nothing of it is ever stored", tokens.len());
    }
    let looked_at = keys.len().min(BLOCKS_PER_REQUEST_MAX);
    let request = MatchPrefixRequest {
        tenant: space.tenant.clone(),
        space_id: space.space_id.clone(),
        keys: keys[..looked_at].iter().map(|key| key.to_vec().into()).collect(),
    };
    let answer = admin.match_prefix(request).await.map_err(refused)?.into_inner();
    let cached = u64::from(answer.prefix_blocks) * u64::from(per_block);
    if format == Format::Json {
        let blocks = answer.blocks.iter().map(|block| {
            let tiers: Vec<_> = block.tiers().map(tier_name).collect();
            json!({ "block_id": output::hex(&block.block_id), "tiers": tiers })
        });
        output::json(&json!({
            "space_id": output::hex(&space.space_id),
            "tokens": tokens.len(),
            "cached_tokens": cached,
            "blocks": blocks.collect::<Vec<_>>(),
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "{cached} of {} tokens are stored: {} of {looked_at} whole blocks",
        tokens.len(),
        answer.prefix_blocks
    );
    let mut table = output::table(&[">TOKENS", "BLOCK", "TIERS"]);
    for (index, block) in answer.blocks.iter().enumerate() {
        let first = index * usize::try_from(per_block).unwrap_or(usize::MAX);
        let tiers: Vec<_> = block.tiers().map(|tier: Tier| tier_name(tier)).collect();
        table.add_row([format!("{first}.."), output::hex(&block.block_id), tiers.join(" ")]);
    }
    if !answer.blocks.is_empty() {
        output::print(&table);
    }
    Ok(ExitCode::SUCCESS)
}

fn choose_space(spaces: &[SpaceInfo], wanted: Option<[u8; 16]>) -> anyhow::Result<&SpaceInfo> {
    if let Some(id) = wanted {
        let found = spaces.iter().find(|space| *space.space_id == id);
        return found
            .ok_or_else(|| anyhow!("there is no space {}; see `terrace space ls`", output::hex(&id)));
    }
    let is_chain =
        |space: &&SpaceInfo| space.manifest.as_ref().is_some_and(|found| found.kind() == SpaceKind::Chain);
    let chains: Vec<_> = spaces.iter().filter(is_chain).collect();
    match chains[..] {
        [only] => Ok(only),
        [] => {
            bail!("no space of prompt blocks is open yet: start a worker, or ask the model something first")
        }
        _ => bail!("there are {} spaces: name one by --space; `terrace space ls` lists them", chains.len()),
    }
}

fn prompt_tokens(target: &Target, args: &PrefixArgs) -> anyhow::Result<Vec<u32>> {
    if let Some(tokens) = &args.tokens {
        return Ok(tokens.clone());
    }
    let file = args.prompt_file.as_deref().unwrap_or(Path::new("-"));
    let mut text = String::new();
    let read = if file == Path::new("-") {
        std::io::stdin().read_to_string(&mut text)
    } else {
        File::open(file).and_then(|mut file| file.read_to_string(&mut text))
    };
    read.with_context(|| format!("cannot read the prompt from {}", file.display()))?;
    let model = match &args.model {
        Some(model) => model.clone(),
        None => connect::running(target).map(|running| running.model).context("give --model PATH")?,
    };
    let tokenizer = Tokenizer::open(&model).with_context(|| format!("cannot use {}", model.display()))?;
    if !args.chat {
        return Ok(tokenizer.encode(&text)?);
    }
    let template = tokenizer.chat().context("this model has no chat template: leave out --chat")?;
    let message = Message { role: "user".to_owned(), content: text };
    Ok(tokenizer.encode_chat(&template.render(&[message])?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ids come from people: short, long, non-hex and signed texts must be refused, not misread.
    #[test]
    fn ids_are_read_strictly() {
        assert_eq!(parse_id("000102030405060708090a0b0c0d0e0f").unwrap()[15], 15);
        for text in ["", "00", "+00102030405060708090a0b0c0d0e0f", &"g".repeat(32), &"0".repeat(33)] {
            assert!(parse_id(text).is_err(), "{text}");
        }
    }
}
