import GemmaKit
import SwiftUI

/// An answer as markdown. Links open in another app, at a tap only.
struct MarkdownView: View {
    let text: String
    let isWhole: Bool

    var body: some View {
        let blocks = parseMarkdown(text, isWhole: isWhole)
        VStack(alignment: .leading, spacing: 8) {
            ForEach(blocks.indices, id: \.self) { index in BlockView(block: blocks[index]) }
        }
        .textSelection(.enabled)
    }
}

private struct BlockView: View {
    let block: MarkdownBlock

    var body: some View {
        HStack(alignment: .firstTextBaseline, spacing: 6) {
            if block.quote > 0 { Text(String(repeating: "▏", count: block.quote)).foregroundStyle(.secondary) }
            if !block.marker.isEmpty { Text(block.marker) }
            content
        }
        .padding(.leading, 20 * CGFloat(block.marker.isEmpty ? block.depth : block.depth - 1))
    }

    @ViewBuilder private var content: some View {
        switch block.kind {
        case .code, .table:
            ScrollView(.horizontal) { Text(block.text).font(.callout.monospaced()) }
        case .heading: Text(attributed(block.spans)).font(block.level == 1 ? .title2 : block.level == 2 ? .title3 : .headline)
        case .rule: Text("———").foregroundStyle(.secondary)
        case .paragraph, .item: Text(attributed(block.spans))
        }
    }
}

private func attributed(_ spans: [MarkdownSpan]) -> AttributedString {
    var text = AttributedString()
    for span in spans {
        var part = AttributedString(span.text)
        var look: InlinePresentationIntent = []
        if span.isBold { look.insert(.stronglyEmphasized) }
        if span.isItalic { look.insert(.emphasized) }
        if span.isCode { look.insert(.code) }
        part.inlinePresentationIntent = look
        part.link = span.link.flatMap { URL(string: $0) }
        text += part
    }
    return text
}
