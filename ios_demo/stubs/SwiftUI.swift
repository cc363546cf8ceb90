// What the app uses of SwiftUI (iOS 18), for a type check on Linux, with the isolation and labels of Apple's interface.
// SwiftUI also gives UIKit and Combine's publishers to those who import it.
@_exported import UIKit
import UniformTypeIdentifiers

// MARK: Views

@MainActor @preconcurrency public protocol View {
    associatedtype Body: View
    @ViewBuilder @MainActor @preconcurrency var body: Body { get }
}

extension Never: View {
    public var body: Never { fatalError() }
}

extension Optional: View where Wrapped: View {
    public var body: Never { fatalError() }
}

/// A view without a body of its own.
public protocol Leaf: View where Body == Never {}
extension Leaf {
    public var body: Never { fatalError() }
}

@resultBuilder public enum ViewBuilder {
    public static func buildExpression<C: View>(_ content: C) -> C { content }
    public static func buildBlock() -> EmptyView { EmptyView() }
    public static func buildBlock<C: View>(_ content: C) -> C { content }
    public static func buildBlock<each C: View>(_ content: repeat each C) -> TupleView<(repeat each C)> { TupleView() }
    public static func buildIf<C: View>(_ content: C?) -> C? { content }
    public static func buildEither<T: View, F: View>(first: T) -> ConditionalContent<T, F> { ConditionalContent() }
    public static func buildEither<T: View, F: View>(second: F) -> ConditionalContent<T, F> { ConditionalContent() }
}

public struct EmptyView: Leaf { public nonisolated init() {} }
public struct TupleView<T>: Leaf { nonisolated init() {} }
public struct ConditionalContent<T, F>: Leaf { nonisolated init() {} }
public struct Modified: Leaf { nonisolated init() {} }
public struct Spacer: Leaf { public init() {} }

public struct LocalizedStringKey: ExpressibleByStringInterpolation, Sendable {
    public init(stringLiteral value: String) {}
}

public struct Text: Leaf {
    public nonisolated init(_ key: LocalizedStringKey) {}
    @_disfavoredOverload public nonisolated init<S: StringProtocol>(_ content: S) {}
    @_disfavoredOverload public nonisolated init(_ attributedContent: AttributedString) {}
}

public struct VStack<C: View>: Leaf {
    public init(alignment: HorizontalAlignment = .center, spacing: CGFloat? = nil, @ViewBuilder content: () -> C) {}
}
public struct LazyVStack<C: View>: Leaf {
    public init(alignment: HorizontalAlignment = .center, spacing: CGFloat? = nil, @ViewBuilder content: () -> C) {}
}
public struct HStack<C: View>: Leaf {
    public init(alignment: VerticalAlignment = .center, spacing: CGFloat? = nil, @ViewBuilder content: () -> C) {}
}
public struct ScrollView<C: View>: Leaf {
    public init(_ axes: Axis.Set = .vertical, showsIndicators: Bool = true, @ViewBuilder content: () -> C) {}
}
public struct NavigationStack<C: View>: Leaf { public init(@ViewBuilder root: () -> C) {} }
public struct List<C: View>: Leaf { public init(@ViewBuilder content: () -> C) {} }
public struct Form<C: View>: Leaf { public init(@ViewBuilder content: () -> C) {} }

public struct Section<C: View>: Leaf {
    public init(_ title: LocalizedStringKey, @ViewBuilder content: () -> C) {}
}
public struct DisclosureGroup<C: View>: Leaf {
    public init(_ title: LocalizedStringKey, @ViewBuilder content: @escaping () -> C) {}
}

public struct ForEach<D: RandomAccessCollection, ID: Hashable, C: View>: DynamicViewContent {}
extension ForEach where ID == D.Element.ID, D.Element: Identifiable {
    public init(_ data: D, @ViewBuilder content: @escaping (D.Element) -> C) {}
}
extension ForEach {
    public init(_ data: D, id: KeyPath<D.Element, ID>, @ViewBuilder content: @escaping (D.Element) -> C) {}
}
public protocol DynamicViewContent: Leaf {}
extension DynamicViewContent {
    public nonisolated func onDelete(perform action: ((IndexSet) -> Void)?) -> some DynamicViewContent { Deletable() }
}
public struct Deletable: DynamicViewContent { nonisolated init() {} }

public struct Button<L: View>: Leaf {}
extension Button where L == Text {
    public init(_ title: LocalizedStringKey, action: @escaping @MainActor () -> Void) {}
    @_disfavoredOverload public init<S: StringProtocol>(_ title: S, action: @escaping @MainActor () -> Void) {}
}
public struct Menu<L: View, C: View>: Leaf {
    public init(@ViewBuilder content: () -> C, @ViewBuilder label: () -> L) {}
}
public struct Image: Leaf { public init(systemName: String) {} }
public struct TextField<L: View>: Leaf {}
extension TextField where L == Text {
    public init(_ title: LocalizedStringKey, text: Binding<String>, axis: Axis) {}
    @_disfavoredOverload public init<S: StringProtocol>(_ title: S, text: Binding<String>, axis: Axis) {}
}
public struct TextEditor: Leaf { public init(text: Binding<String>) {} }
public struct Toggle<L: View>: Leaf {}
extension Toggle where L == Text { public init(_ title: LocalizedStringKey, isOn: Binding<Bool>) {} }
public struct Slider<L: View, V: View>: Leaf {}
extension Slider where L == EmptyView, V == EmptyView {
    public init<N: BinaryFloatingPoint>(
        value: Binding<N>, in bounds: ClosedRange<N> = 0...1, onEditingChanged: @escaping (Bool) -> Void = { _ in }
    ) where N.Stride: BinaryFloatingPoint {}
}
public struct Stepper<L: View>: Leaf {}
extension Stepper where L == Text {
    public init<N: Strideable>(_ title: LocalizedStringKey, value: Binding<N>, in bounds: ClosedRange<N>, step: N.Stride = 1) {}
}
public struct Picker<L: View, S: Hashable, C: View>: Leaf {}
extension Picker where L == Text {
    public init(_ title: LocalizedStringKey, selection: Binding<S>, @ViewBuilder content: () -> C) {}
}
extension View {
    public nonisolated func tag<V: Hashable>(_ tag: V) -> some View { self }
}
public struct ProgressView<L: View, V: View>: Leaf {}
extension ProgressView where L == EmptyView, V == EmptyView {
    public nonisolated init<N: BinaryFloatingPoint>(value: N?, total: N = 1.0) {}
}
public struct ShareLink: Leaf { public init(item: URL) {} }
public struct ContentUnavailableView<L: View, D: View, A: View>: Leaf {}
extension ContentUnavailableView where L == EmptyView, D == Text?, A == EmptyView {
    public init(_ title: LocalizedStringKey, systemImage: String, description: Text? = nil) {}
}

public struct TabView<C: TabContent>: Leaf { public init(@TabContentBuilder content: () -> C) {} }
@MainActor @preconcurrency public protocol TabContent {}
@resultBuilder public enum TabContentBuilder {
    public static func buildBlock<each C: TabContent>(_ content: repeat each C) -> TupleTab<(repeat each C)> { TupleTab() }
}
public struct TupleTab<T>: TabContent { nonisolated init() {} }
public struct Tab<C: View>: TabContent {
    public init(_ title: LocalizedStringKey, systemImage: String, @ViewBuilder content: () -> C) {}
}

// MARK: Apps

@MainActor @preconcurrency public protocol App {
    associatedtype Body: Scene
    @SceneBuilder @MainActor @preconcurrency var body: Body { get }
    @MainActor @preconcurrency init()
}
extension App {
    public static func main() {}
}
@MainActor @preconcurrency public protocol Scene {
    associatedtype Body: Scene
    @MainActor @preconcurrency var body: Body { get }
}
extension Never: Scene {}
@resultBuilder public enum SceneBuilder {
    public static func buildBlock<C: Scene>(_ content: C) -> C { content }
}
public struct WindowGroup<C: View>: Scene {
    public init(@ViewBuilder content: () -> C) {}
    public var body: Never { fatalError() }
}
public enum ScenePhase: Sendable { case background, inactive, active }

// MARK: State

@propertyWrapper public struct State<V> {
    public init(wrappedValue: V) {}
    public init(initialValue: V) {}
    public var wrappedValue: V {
        get { fatalError() }
        nonmutating set {}
    }
    public var projectedValue: Binding<V> { fatalError() }
}
extension State where V: ExpressibleByNilLiteral {
    public init() {}
}
@propertyWrapper @dynamicMemberLookup public struct Binding<V> {
    public init(get: @escaping @isolated(any) @Sendable () -> V, set: @escaping @isolated(any) @Sendable (V) -> Void) {}
    public var wrappedValue: V {
        get { fatalError() }
        nonmutating set {}
    }
    public var projectedValue: Binding<V> { self }
    public subscript<Part>(dynamicMember path: WritableKeyPath<V, Part>) -> Binding<Part> { fatalError() }
}
@propertyWrapper public struct Environment<V> {
    public init(_ path: KeyPath<EnvironmentValues, V>) {}
    public var wrappedValue: V { fatalError() }
}
public struct EnvironmentValues {
    public var dismiss: DismissAction { fatalError() }
    public var scenePhase: ScenePhase { fatalError() }
}
@MainActor @preconcurrency public struct DismissAction { public func callAsFunction() {} }

// MARK: Values

public enum HorizontalAlignment: Sendable { case leading, center, trailing }
public struct Alignment: Sendable, Equatable { public static let leading = Self(), trailing = Self(), center = Self() }
public enum VerticalAlignment: Sendable { case center, firstTextBaseline }
public enum Axis: Sendable {
    case horizontal, vertical
    public struct Set: OptionSet, Sendable {
        public let rawValue: Int8
        public init(rawValue: Int8) { self.rawValue = rawValue }
        public static let horizontal = Self(rawValue: 1), vertical = Self(rawValue: 2)
    }
}
public enum Edge: Sendable {
    case leading
    public struct Set: OptionSet, Sendable {
        public let rawValue: Int8
        public init(rawValue: Int8) { self.rawValue = rawValue }
        public static let leading = Self(rawValue: 2)
    }
}
public struct AccessibilityChildBehavior: Sendable { public static let contain = Self() }
public struct UnitPoint: Sendable { public static let bottom = Self() }
public protocol ShapeStyle: Sendable {}
public struct HierarchicalShapeStyle: ShapeStyle {}
public struct Color: ShapeStyle {}
extension ShapeStyle where Self == HierarchicalShapeStyle {
    public static var primary: Self { fatalError() }
    public static var secondary: Self { fatalError() }
}
extension ShapeStyle where Self == Color { public static var orange: Color { fatalError() } }
public struct TintShapeStyle: ShapeStyle {}
public struct FillShapeStyle: ShapeStyle {}
extension ShapeStyle where Self == TintShapeStyle { public static var tint: Self { fatalError() } }
extension ShapeStyle where Self == FillShapeStyle { public static var fill: Self { fatalError() } }
extension ShapeStyle {
    public var tertiary: some ShapeStyle { FillShapeStyle() }
    public func opacity(_ opacity: Double) -> some ShapeStyle { self }
}
public struct Font: Sendable {
    public static let body = Self(), callout = Self(), caption = Self(), headline = Self(), title2 = Self(), title3 = Self()
    public func monospaced() -> Font { self }
}
public protocol TextSelectability {}
public struct EnabledTextSelectability: TextSelectability {}
extension TextSelectability where Self == EnabledTextSelectability { public static var enabled: Self { .init() } }
public protocol TextFieldStyle {}
public struct RoundedBorderTextFieldStyle: TextFieldStyle {}
extension TextFieldStyle where Self == RoundedBorderTextFieldStyle { public static var roundedBorder: Self { .init() } }
public struct TextInputAutocapitalization: Sendable { public static var never: Self { .init() } }
public struct ToolbarItemPlacement { public static let cancellationAction = Self(), confirmationAction = Self() }
@MainActor @preconcurrency public protocol ToolbarContent {}
public struct ToolbarItem<C: View>: ToolbarContent {
    public init(placement: ToolbarItemPlacement, @ViewBuilder content: () -> C) {}
}
@resultBuilder public enum ToolbarContentBuilder {
    public static func buildBlock<each C: ToolbarContent>(_ content: repeat each C) -> TupleTools<(repeat each C)> {
        TupleTools()
    }
}
public struct TupleTools<T>: ToolbarContent { nonisolated init() {} }

// Foundation has these on Apple's systems, but not on Linux.
public struct InlinePresentationIntent: OptionSet, Hashable, Sendable {
    public let rawValue: UInt
    public init(rawValue: UInt) { self.rawValue = rawValue }
    public static let emphasized = Self(rawValue: 1), stronglyEmphasized = Self(rawValue: 2), code = Self(rawValue: 4)
}
extension AttributedString {
    public var inlinePresentationIntent: InlinePresentationIntent? {
        get { fatalError() }
        set {}
    }
}

// MARK: Modifiers

extension View {
    public nonisolated func foregroundStyle<S: ShapeStyle>(_ style: S) -> some View { Modified() }
    public nonisolated func font(_ font: Font?) -> some View { Modified() }
    public nonisolated func padding(_ length: CGFloat? = nil) -> some View { Modified() }
    public nonisolated func background<S: ShapeStyle, T: InsettableShape>(_ style: S, in shape: T) -> some View { Modified() }
    public nonisolated func padding(_ edges: Edge.Set, _ length: CGFloat? = nil) -> some View { Modified() }
    public nonisolated func accessibilityElement(children: AccessibilityChildBehavior) -> some View { Modified() }
    public nonisolated func frame(
        minWidth: CGFloat? = nil, maxWidth: CGFloat? = nil, minHeight: CGFloat? = nil, alignment: Alignment = .center
    ) -> some View { Modified() }
    public nonisolated func textSelection<S: TextSelectability>(_ selectability: S) -> some View { Modified() }
    public nonisolated func defaultScrollAnchor(_ anchor: UnitPoint?) -> some View { Modified() }
    public nonisolated func textFieldStyle<S: TextFieldStyle>(_ style: S) -> some View { Modified() }
    public nonisolated func disabled(_ disabled: Bool) -> some View { Modified() }
    public nonisolated func accessibilityLabel(_ label: LocalizedStringKey) -> some View { Modified() }
    @_disfavoredOverload public nonisolated func accessibilityLabel<S: StringProtocol>(_ label: S) -> some View { Modified() }
    public nonisolated func sheet<Item: Identifiable, C: View>(
        item: Binding<Item?>, onDismiss: (() -> Void)? = nil, @ViewBuilder content: @escaping (Item) -> C
    ) -> some View { Modified() }
    public nonisolated func fileImporter(
        isPresented: Binding<Bool>, allowedContentTypes: [UTType],
        onCompletion: @escaping (Swift.Result<URL, any Error>) -> Void
    ) -> some View { Modified() }
    public nonisolated func autocorrectionDisabled(_ disable: Bool = true) -> some View { Modified() }
    public nonisolated func textInputAutocapitalization(_ kind: TextInputAutocapitalization?) -> some View { Modified() }
    public nonisolated func navigationTitle(_ title: LocalizedStringKey) -> some View { Modified() }
    public nonisolated func toolbar<C: ToolbarContent>(@ToolbarContentBuilder content: () -> C) -> some View { Modified() }
    public nonisolated func overlay<V: View>(
        alignment: Alignment = .center, @ViewBuilder content: () -> V
    ) -> some View { Modified() }
    public nonisolated func onAppear(perform action: (() -> Void)? = nil) -> some View { Modified() }
    public nonisolated func task(
        priority: TaskPriority = .userInitiated, @_inheritActorContext _ action: sending @escaping @isolated(any) () async -> Void
    ) -> some View { Modified() }
    public nonisolated func onChange<V: Equatable>(
        of value: V, initial: Bool = false, _ action: @escaping (_ old: V, _ new: V) -> Void
    ) -> some View { Modified() }
    public nonisolated func onReceive<P: Publisher>(
        _ publisher: P, perform action: @escaping (P.Output) -> Void
    ) -> some View where P.Failure == Never { Modified() }
}

// MARK: Combine

public protocol Publisher {
    associatedtype Output
    associatedtype Failure: Error
}
extension NotificationCenter {
    public struct Publisher: SwiftUI.Publisher {
        public typealias Output = Notification
        public typealias Failure = Never
    }
    public func publisher(for name: Notification.Name, object: AnyObject? = nil) -> Publisher { Publisher() }
}

// MARK: Shapes

public struct Path: Sendable {
    public init() {}
    public mutating func addLines(_ lines: [CGPoint]) {}
}
public protocol Shape: Leaf, Sendable {
    nonisolated func path(in rect: CGRect) -> Path
}
public protocol InsettableShape: Shape {}
public struct RoundedRectangle: InsettableShape {
    public nonisolated init(cornerRadius: CGFloat) {}
    public nonisolated func path(in rect: CGRect) -> Path { fatalError() }
}
public struct StrokedShape: Shape {
    nonisolated init() {}
    public nonisolated func path(in rect: CGRect) -> Path { fatalError() }
}
extension Shape {
    public nonisolated func stroke(lineWidth: CGFloat = 1) -> some Shape { StrokedShape() }
}
extension View {
    public nonisolated func frame(width: CGFloat? = nil, height: CGFloat? = nil, alignment: Alignment = .center) -> some View {
        Modified()
    }
}
